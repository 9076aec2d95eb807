// What the official SDK makes of a 402, as the parties that read one. Line protocol (lines.mjs):
//   in   {key, required}   required: what PAYMENT-REQUIRED holds
//   out  {spec, listed, offers: [{signer, payload, accepts}…], payload}
// The client of the SDK pays the first offer; its payment is what a facilitator catalogs from.
import { x402Client } from "@x402/core/client";
import { ExactEvmScheme } from "@x402/evm";
import { extractDiscoveryInfo, validateDiscoveryExtensionSpec } from "@x402/extensions/bazaar";
import {
  extractOffersFromPaymentRequired, findAcceptsObjectFromSignedOffer, verifyOfferSignatureEIP712,
} from "@x402/extensions/offer-receipt";
import { privateKeyToAccount } from "viem/accounts";
import { serve } from "./lines.mjs";

await serve(async ({ key, required }) => {
  const client = new x402Client().register("eip155:*", new ExactEvmScheme(privateKeyToAccount(key)));
  const payload = await client.createPaymentPayload(required);
  const bazaar = required.extensions?.bazaar;
  const offers = [];
  for (const offer of extractOffersFromPaymentRequired(required)) {
    const { signer, payload: signed } = await verifyOfferSignatureEIP712(offer);
    const accepts = findAcceptsObjectFromSignedOffer(offer, required.accepts);
    offers.push({ signer, payload: signed, accepts: accepts ?? null });
  }
  return {
    spec: bazaar ? validateDiscoveryExtensionSpec(bazaar) : null,
    listed: extractDiscoveryInfo(payload, payload.accepted),
    offers,
    payload,
  };
});
