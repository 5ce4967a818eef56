"""What the commands of `luthier` do."""
