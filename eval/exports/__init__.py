"""What other tools of the field read."""
