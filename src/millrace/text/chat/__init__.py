"""What a chat needs before it is a prompt, and where its turns are known already."""
