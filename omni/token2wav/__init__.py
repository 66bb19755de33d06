"""Qwen2.5-Omni's way from speech codes to sound: a flow-matching DiT draws a mel, BigVGAN makes it a waveform."""
