"""Some rows or columns of many matrices, copied aside and written back bit for bit, in few launches."""
