"""Networks, data and trainers that several recipes share."""
