// The official x402 v2 client of a user who pays by Permit2 only: a policy, as its README says.
//   node permit2_v2.mjs URL PRIVATE_KEY [METHOD] [BODY] [COUNT] [RPC_URL]
// With RPC_URL it can see its allowance, and signs an EIP-2612 permit where one is taken.
import { ExactEvmScheme } from "@x402/evm";
import { wrapFetchWithPaymentFromConfig } from "@x402/fetch";
import { privateKeyToAccount } from "viem/accounts";
import { argumentsOf, report } from "./answer.mjs";

const { url, key, init, count } = argumentsOf("permit2_v2.mjs");
const rpcUrl = process.argv[7];
const client = new ExactEvmScheme(privateKeyToAccount(key), rpcUrl ? { rpcUrl } : undefined);
const fetchWithPayment = wrapFetchWithPaymentFromConfig(fetch, {
  schemes: [{ network: "eip155:*", client }],
  policies: [
    (version, offers) => offers.filter((each) => each.extra?.assetTransferMethod === "permit2"),
  ],
});
for (let n = 0; n < count; n += 1) await report(() => fetchWithPayment(url, init));
