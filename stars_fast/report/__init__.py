"""What measurements share: figures, drawn to files by matplotlib of the extra ``report``, and the weights of models."""
