"""What an exported folder is made of: the encoders in other libraries' layouts, and the model card."""
