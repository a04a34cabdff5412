"""What a cluster lacks for a layout, and how far a rollout is; nothing here changes a cluster."""
