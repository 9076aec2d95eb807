// One JSON object a line in, one a line out, in order: a test needs one Node process, not hundreds.
import { createInterface } from "node:readline";

export async function serve(answer) {
  for await (const line of createInterface({ input: process.stdin, crlfDelay: Infinity })) {
    if (line === "") continue;
    let reply;
    try {
      reply = await answer(JSON.parse(line));
    } catch (error) {
      reply = { error: `${error?.name ?? "Error"}: ${error?.message ?? error}` };
    }
    process.stdout.write(`${JSON.stringify(reply)}\n`);
  }
}

export function requestOf({ method, url, headers, body_base64 }) {
  const init = { method, headers: headers ?? [] };
  if (body_base64 !== null && body_base64 !== undefined) {
    init.body = Buffer.from(body_base64, "base64");
    init.duplex = "half";
  }
  return new Request(url, init);
}
