"""What makes low bits accurate: corrections that are made when weights are rounded."""
