"""The optimizer: groups, the steps of BLAQ and LAQ, and the reference that specifies them."""
