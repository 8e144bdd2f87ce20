"""What SAT is compared with, each with the settings of its source and a test against its arithmetic written out."""
