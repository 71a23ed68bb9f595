//! SPDY/3.1 and WebSocket server side of exec, attach and port-forward, and the relay of upgraded connections.
