"""Coppice grows many virtual machines from one."""
