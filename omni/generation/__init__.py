"""Generation: sampling, the step functions of the Thinker and the Talker, and whole replies made of them."""
