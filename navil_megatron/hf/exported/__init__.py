"""What an exported folder holds beside weights and config."""
