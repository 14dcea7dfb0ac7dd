"""What twicing is where it comes from: kernel regression, non-local means, and the spectrum of a repeated smoother."""
