"""How things look on disk: weights, video files, Wan2.1's folders, and which encoders a folder holds."""
