"""Linearisation around the inputs: Fisher information, margins, and the attacks they are compared with."""
