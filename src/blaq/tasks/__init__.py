"""The data sets, networks and losses of the papers."""
