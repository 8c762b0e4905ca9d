"""Tests of vpnd.packet."""
