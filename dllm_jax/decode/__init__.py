"""The decoding loops: jitted, on the device, over static buffers."""
