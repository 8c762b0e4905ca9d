"""Flows: where each one's packets go, and where they wait."""
