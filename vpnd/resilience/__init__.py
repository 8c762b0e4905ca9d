"""What is done about things that fail: waiting, giving up, leaving alone. Values that know neither clock nor dice."""
