// A go-libp2p peer that does as it is told: a command a line on standard input, an answer a line on standard output,
// both JSON.  peer KEYFILE LISTEN, where KEYFILE is a libp2p private key in protobuf and LISTEN a multiaddr or "none".
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"time"

	"github.com/libp2p/go-libp2p"
	dht "github.com/libp2p/go-libp2p-kad-dht"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/muxer/yamux"
	"github.com/libp2p/go-libp2p/p2p/protocol/ping"
	"github.com/libp2p/go-libp2p/p2p/security/noise"
	"github.com/libp2p/go-libp2p/p2p/transport/tcp"
)

const patience = 15 * time.Second

type command struct {
	Do      string `json:"do"`
	Address string `json:"address"`
	Times   int    `json:"times"`
}

type answer map[string]any

func main() {
	raw, err := os.ReadFile(os.Args[1])
	fatal(err)
	key, err := crypto.UnmarshalPrivateKey(raw)
	fatal(err)
	options := []libp2p.Option{
		libp2p.Identity(key),
		libp2p.Transport(tcp.NewTCPTransport),
		libp2p.Security(noise.ID, noise.New),
		libp2p.Muxer(yamux.ID, yamux.DefaultTransport),
		libp2p.DisableRelay(),
		// its own limits on how often it dials are not what is tried here
		libp2p.ResourceManager(&network.NullResourceManager{}),
	}
	if os.Args[2] == "none" {
		options = append(options, libp2p.NoListenAddrs)
	} else {
		options = append(options, libp2p.ListenAddrStrings(os.Args[2]))
	}
	node, err := libp2p.New(options...)
	fatal(err)
	say(answer{"peer_id": node.ID().String()})
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		var one command
		fatal(json.Unmarshal(lines.Bytes(), &one))
		result, err := obey(node, one)
		if err != nil {
			result = answer{"error": err.Error()}
		}
		say(result)
	}
}

func obey(node host.Host, one command) (answer, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if one.Do == "connections" {
		return answer{"peers": node.Network().Peers()}, nil
	}
	other, err := peer.AddrInfoFromString(one.Address)
	if err != nil {
		return nil, err
	}
	switch one.Do {
	case "connect":
		return answer{}, node.Connect(ctx, *other)
	case "identify":
		if err := node.Connect(ctx, *other); err != nil {
			return nil, err
		}
		return identified(ctx, node, other.ID)
	case "ping":
		if err := node.Connect(ctx, *other); err != nil {
			return nil, err
		}
		return pinged(ctx, node, other.ID, one.Times)
	case "reconnect":
		return reconnected(node, *other, one.Times)
	case "kad":
		return asked(ctx, node, *other)
	}
	return nil, fmt.Errorf("no such command: %s", one.Do)
}

// identified waits for what the other side says of itself.
func identified(ctx context.Context, node host.Host, id peer.ID) (answer, error) {
	for ctx.Err() == nil {
		agent, err := node.Peerstore().Get(id, "AgentVersion")
		protocols, _ := node.Peerstore().GetProtocols(id)
		if err == nil && len(protocols) > 0 {
			return answer{"agent": agent, "protocols": protocols, "addresses": node.Peerstore().Addrs(id)}, nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return nil, ctx.Err()
}

func pinged(ctx context.Context, node host.Host, id peer.ID, times int) (answer, error) {
	results := ping.Ping(ctx, node, id)
	var worst time.Duration
	for range times {
		result := <-results
		if result.Error != nil {
			return nil, result.Error
		}
		worst = max(worst, result.RTT)
	}
	return answer{"worst_ms": float64(worst.Microseconds()) / 1000}, nil
}

// reconnected connects, pings and leaves, over and over. Each time is given its own patience.
func reconnected(node host.Host, other peer.AddrInfo, times int) (answer, error) {
	for done := range times {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		err := node.Connect(ctx, other)
		if err == nil {
			_, err = pinged(ctx, node, other.ID, 1)
		}
		cancel()
		if err != nil {
			return nil, fmt.Errorf("the %dth time: %w", done+1, err)
		}
		if err := node.Network().ClosePeer(other.ID); err != nil {
			return nil, err
		}
	}
	return answer{"times": times}, nil
}

// asked looks this peer itself up in the table of the other one.
func asked(ctx context.Context, node host.Host, other peer.AddrInfo) (answer, error) {
	table, err := dht.New(node, dht.Mode(dht.ModeClient), dht.BootstrapPeers(other))
	if err != nil {
		return nil, err
	}
	defer table.Close()
	if err := node.Connect(ctx, other); err != nil {
		return nil, err
	}
	for table.RoutingTable().Find(other.ID) == "" {
		if ctx.Err() != nil {
			return nil, fmt.Errorf("the node never came into the routing table")
		}
		time.Sleep(20 * time.Millisecond)
	}
	closest, err := table.GetClosestPeers(ctx, "vpnd")
	if err != nil {
		return nil, err
	}
	return answer{"closest": closest}, nil
}

func say(one answer) {
	line, err := json.Marshal(one)
	fatal(err)
	fmt.Println(string(line))
}

func fatal(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
