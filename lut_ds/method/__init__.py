"""What is learned: encoder, decoder, heads, masking and losses. Pure torch; no I/O, no distributed calls, no config object."""
