// A SharedWorker: one for all tabs, with the one stream that they share.

import { Feed } from "./feed.js";

const feed = new Feed();
self.onconnect = ({ ports: [port] }) => feed.attach(port);
