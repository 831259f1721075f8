"""The page at `/`: a browser's view of this server. Static files and the routes that send them; no logic of serving."""
