"""Networks, data, training and printing that several recipes share."""
