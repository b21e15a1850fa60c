"""Finds the moments at which tokens can be removed, asks methods for decisions, and applies them.

`journal` undoes, `deciding` asks, `encoder` and `decoder` hook, `prompt` finds visual tokens in a call,
`sequence` is the algebra of slots, `cache` is what stays behind for decoding.
"""
