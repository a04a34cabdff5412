"""Kubernetes objects as plain data, each made from a layout; nothing here reads or writes files."""
