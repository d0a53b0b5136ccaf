"""Reading and writing Relax modules: what passes and the frontend share, without any decision about precision."""
