"""The Talker: speech codes from text and multimodal context, frame by frame."""
