// The official TypeScript MCP client, paying with the official x402 client as x402's MCP transport says.
//   node mcp_js.mjs URL PRIVATE_KEY TOOL ARGUMENTS [COUNT]
// Prints a JSON line with the list of tools, then one a call.
import { Client } from "@modelcontextprotocol/sdk/client/index.js";
import { StreamableHTTPClientTransport } from "@modelcontextprotocol/sdk/client/streamableHttp.js";
import { x402Client } from "@x402/core/client";
import { ExactEvmScheme } from "@x402/evm";
import { privateKeyToAccount } from "viem/accounts";

const [url, key, name, text, count = "1"] = process.argv.slice(2);
const say = (line) => process.stdout.write(`${JSON.stringify(line)}\n`);
const payer = new x402Client().register("eip155:*", new ExactEvmScheme(privateKeyToAccount(key)));
const client = new Client({ name: "farebox-test", version: "1" });
await client.connect(new StreamableHTTPClientTransport(new URL(url)));
say(await client.listTools());
for (let n = 0; n < Number(count); n += 1) {
  const call = { name, arguments: JSON.parse(text) };
  let got = await client.callTool(call);
  const asked = got.isError && got.structuredContent?.accepts ? got.structuredContent : null;
  if (asked) {
    const payment = await payer.createPaymentPayload(asked);
    got = await client.callTool({ ...call, _meta: { "x402/payment": payment } });
  }
  say({
    text: got.content.map((each) => each.text),
    error: got.isError ?? false,
    paid: asked !== null,
    response: got._meta?.["x402/payment-response"] ?? null,
    meta: got._meta,
  });
}
await client.close();
