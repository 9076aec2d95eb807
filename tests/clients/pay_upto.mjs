// The official x402 v2 client with the scheme upto registered beside exact.
//   node pay_upto.mjs URL PRIVATE_KEY [METHOD] [BODY] [COUNT]
import { ExactEvmScheme } from "@x402/evm";
import { UptoEvmScheme } from "@x402/evm/upto/client";
import { wrapFetchWithPaymentFromConfig } from "@x402/fetch";
import { privateKeyToAccount } from "viem/accounts";
import { argumentsOf, report } from "./answer.mjs";

const { url, key, init, count } = argumentsOf("pay_upto.mjs");
const account = privateKeyToAccount(key);
const fetchWithPayment = wrapFetchWithPaymentFromConfig(fetch, {
  schemes: [
    { network: "eip155:*", client: new ExactEvmScheme(account) },
    { network: "eip155:*", client: new UptoEvmScheme(account) },
  ],
});
for (let n = 0; n < count; n += 1) await report(() => fetchWithPayment(url, init));
