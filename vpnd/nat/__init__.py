"""Reaching members behind NATs and firewalls: the words and the rules, without any I/O."""
