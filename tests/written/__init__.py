"""What each version wrote, and the script that writes it."""
