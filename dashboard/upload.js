// Media in a request: as base64 where they fit, as blobs before it where they do not (docs/mqtt.md, Media).

import sha256 from "./vendor/sha256.min.mjs";
import { ReplyError } from "./broker.js";
import { newId, number, object } from "./values.js";

// As `nestd ask` does: quick, and small enough to be sent again without regret.
const CHUNK_BYTES = 256 * 1024;
const LEAST_CHUNK_BYTES = 1024;
const ROUNDS = 5;
const FIN_MS = 60_000;
// Around the request's fields in a packet: topic, properties, the id, the parts' own keys.
const MARGIN_BYTES = 4096;

// Returns the content parts of `media` ({kind, bytes}); `progress(words)` tells how far it is.
export async function contentOf(media, broker, node, fieldBytes, progress) {
  const taken = number(object(node.info.limits).request_bytes);
  if (media.length > 0 && taken === null) throw new ReplyError("The node has not told how much it takes.");
  const limit = Math.min(taken, broker.maximumPacketSize);
  let room = limit - fieldBytes - MARGIN_BYTES;
  const parts = [];
  for (const medium of media) {
    const length = Math.ceil(medium.bytes.length / 3) * 4;
    if (length <= room) {
      room -= length;
      parts.push({ type: medium.kind, data: base64(medium.bytes) });
    } else {
      const chunk = Math.max(LEAST_CHUNK_BYTES, Math.min(CHUNK_BYTES, Math.floor(limit / 2)));
      const blob = await upload(medium, broker, node, chunk, progress);
      parts.push({ type: medium.kind, blob });
    }
  }
  return parts;
}

// Sends a medium in pieces and returns the blob's id once the node has all of it.
async function upload(medium, broker, node, chunkBytes, progress) {
  const { bytes } = medium;
  const id = newId();
  const topic = `${broker.base}/${node.name}/blob/${id}`;
  const stated = { size: bytes.length, sha256: sha256(bytes) };
  let reply = await broker.exchange(`${topic}/init`, stated, 1);
  for (let round = 0; round < ROUNDS; round += 1) {
    const missing = object(reply.data).missing ?? [];
    if (missing.length === 0) break;
    for (const [start, end] of missing) {
      for (let offset = start; offset < end; offset += chunkBytes) {
        progress(`Sending ${medium.name}: ${Math.floor((100 * offset) / bytes.length)} %`);
        await broker.publish(`${topic}/${offset}`, bytes.subarray(offset, Math.min(end, offset + chunkBytes)));
      }
    }
    reply = await broker.exchange(`${topic}/fin`, stated, 1, FIN_MS);
  }
  if (reply.ok !== true) throw new ReplyError(String(object(reply.error).message));
  return id;
}

function base64(bytes) {
  let binary = "";
  for (let start = 0; start < bytes.length; start += 0x8000) {
    binary += String.fromCharCode(...bytes.subarray(start, start + 0x8000));
  }
  return btoa(binary);
}
