"""Images with labels: where they are read, how they are decoded and varied, and the examples made of them."""
