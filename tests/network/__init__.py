"""Tests of supervisor.network, and of offloads against a real kernel."""
