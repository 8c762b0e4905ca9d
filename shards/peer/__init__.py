"""Peers: what carries packets to each, and which flow uses what."""
