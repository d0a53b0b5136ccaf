"""Every operator as plain loop nests."""
