"""The version of memwrap, where it can be read without importing anything else."""

VERSION = "0.1.0"
