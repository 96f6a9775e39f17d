"""What was trained, as files to ship: every exporter starts from `blaq.export.layers`, never from rounded floats."""
