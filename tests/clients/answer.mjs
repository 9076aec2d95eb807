// What the paying clients print: one JSON line a call.
const INTEREST = [
  "payment-required", "payment-response", "x-payment-response", "retry-after", "content-type",
  "cache-control", "farebox-paid-from", "farebox-charged", "farebox-balance", "farebox-held",
  "farebox-request-id", "farebox-replayed", "farebox-credential",
];

export async function report(call) {
  try {
    const response = await call();
    const headers = {};
    for (const name of INTEREST) {
      const value = response.headers.get(name);
      if (value !== null) headers[name] = value;
    }
    const body = await response.text();
    process.stdout.write(`${JSON.stringify({ status: response.status, headers, body })}\n`);
  } catch (error) {
    const text = `${error?.name ?? "Error"}: ${error?.message ?? error}`;
    process.stdout.write(`${JSON.stringify({ error: text })}\n`);
  }
}

export function argumentsOf(script) {
  const [url, key, method = "GET", body = "", count = "1"] = process.argv.slice(2);
  if (!url || !key) {
    process.stderr.write(`usage: node ${script} URL PRIVATE_KEY [METHOD] [BODY] [COUNT]\n`);
    process.exit(2);
  }
  const init = { method };
  if (body !== "") {
    init.body = body;
    init.headers = { "Content-Type": "application/json" };
  }
  return { url, key, init, count: Number(count) };
}
