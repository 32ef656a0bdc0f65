"""What penjing knows of a PyTorch net: layers, norms, channels that belong together, what runs show."""
