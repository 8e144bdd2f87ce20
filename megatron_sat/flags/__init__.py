"""What may stand on the command line and in a configuration file: names, defaults, refusals, checks."""
