// A js-libp2p peer that does as it is told: a command a line on standard input, an answer a line on standard output,
// both JSON.  peer.mjs KEYFILE LISTEN, where KEYFILE is a libp2p private key in protobuf and LISTEN a multiaddr or "none".
import { readFileSync } from 'node:fs'
import { createInterface } from 'node:readline'
import { noise } from '@chainsafe/libp2p-noise'
import { yamux } from '@chainsafe/libp2p-yamux'
import { privateKeyFromProtobuf } from '@libp2p/crypto/keys'
import { identify } from '@libp2p/identify'
import { kadDHT, passthroughMapper } from '@libp2p/kad-dht'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'

const PATIENCE_MS = 15_000
const [keyFile, listen] = process.argv.slice(2)

const node = await createLibp2p({
  privateKey: privateKeyFromProtobuf(readFileSync(keyFile)),
  addresses: { listen: listen === 'none' ? [] : [listen] },
  transports: [tcp()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  services: {
    identify: identify({ maxOutboundStreams: 16 }), // it identifies each peer by itself as well
    ping: ping({ maxOutboundStreams: 16 }), // the table pings as well
    dht: kadDHT({ protocol: '/ipfs/kad/1.0.0', peerInfoMapper: passthroughMapper, clientMode: true })
  }
})
const say = (answer) => console.log(JSON.stringify(answer))
const patience = () => ({ signal: AbortSignal.timeout(PATIENCE_MS) })
const idOf = (address) => address.getComponents().find((part) => part.name === 'p2p').value

async function obey ({ do: what, address: text, times }) {
  if (what === 'connections') return { peers: node.getPeers().map(String) }
  const address = multiaddr(text)
  switch (what) {
    case 'connect':
      await node.dial(address, patience())
      return {}
    case 'identify': {
      const connection = await node.dial(address, patience())
      const said = await node.services.identify.identify(connection, patience())
      return { agent: said.agentVersion, protocols: said.protocols, addresses: said.listenAddrs.map(String) }
    }
    case 'ping': {
      let worst = 0
      for (let done = 0; done < times; done++) worst = Math.max(worst, await node.services.ping.ping(address, patience()))
      return { worst_ms: worst }
    }
    case 'reconnect':
      for (let done = 0; done < times; done++) {
        const connection = await node.dial(address, patience())
        await node.services.ping.ping(address, patience())
        await connection.close()
      }
      return { times }
    case 'kad': {
      const connection = await node.dial(address, patience())
      await node.services.dht.routingTable.add(connection.remotePeer, patience())
      const closest = []
      for await (const event of node.services.dht.getClosestPeers(new TextEncoder().encode('vpnd'), patience())) {
        if (event.name === 'PEER_RESPONSE') closest.push(String(event.from))
      }
      if (closest.length === 0) throw new Error(`${idOf(address)} did not answer`)
      return { closest }
    }
  }
  throw new Error(`no such command: ${what}`)
}

say({ peer_id: String(node.peerId) })
for await (const line of createInterface({ input: process.stdin })) {
  try {
    say(await obey(JSON.parse(line)))
  } catch (error) {
    say({ error: [error.name, error.message, ...(error.errors ?? []).map((one) => one.message)].join(': ') })
  }
}
await node.stop()
process.exit(0)
