"""What the tests add to Millrace: the examples of docs/extending.md."""
