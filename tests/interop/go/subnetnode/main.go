// A node of the system that vpnd is rebuilt from, as others see it on the wire.
//
//	subnetnode KEYFILE LISTEN DEVICE PEER=MULTIADDR ...      PEER: its virtual IP, MULTIADDR: with its peer id
//
// It reads the TUN device DEVICE, which is there already, and opens a stream for what it sends to a peer; who is idle loses
// it. It takes the streams of everybody. "ready" on standard output, then a line for each stream that it opens or closes.
package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/muxer/yamux"
	"github.com/libp2p/go-libp2p/p2p/security/noise"
	tls "github.com/libp2p/go-libp2p/p2p/security/tls"
	"github.com/libp2p/go-libp2p/p2p/transport/tcp"
	"golang.org/x/sys/unix"
)

const (
	protocol  = "/vpn/1.0.0"
	mtu       = 1400
	idle      = 10 * time.Second
	lookEvery = 20 * time.Second
	attempts  = 6
	patience  = 5 * time.Second
)

// sender is the way to one peer: at most one stream, which the one reader of the device writes to.
type sender struct {
	peer   peer.AddrInfo
	mutex  sync.Mutex
	stream network.Stream
	used   atomic.Int64
}

func main() {
	raw, err := os.ReadFile(os.Args[1])
	fatal(err)
	key, err := crypto.UnmarshalPrivateKey(raw)
	fatal(err)
	device := open(os.Args[3])
	node, err := libp2p.New(
		libp2p.Identity(key),
		libp2p.ListenAddrStrings(os.Args[2]),
		libp2p.Transport(tcp.NewTCPTransport),
		libp2p.Security(tls.ID, tls.New),
		libp2p.Security(noise.ID, noise.New),
		libp2p.Muxer(yamux.ID, yamux.DefaultTransport),
		libp2p.DisableRelay(),
		libp2p.ResourceManager(&network.NullResourceManager{}),
	)
	fatal(err)
	node.SetStreamHandler(protocol, func(stream network.Stream) { receive(stream, device) })
	senders := map[netip.Addr]*sender{}
	for _, word := range os.Args[4:] {
		address, multiaddr, _ := strings.Cut(word, "=")
		info, err := peer.AddrInfoFromString(multiaddr)
		fatal(err)
		one := &sender{peer: *info}
		senders[netip.MustParseAddr(address)] = one
		go one.closeIdle()
	}
	fmt.Println("ready")
	packet := make([]byte, 4+65535)
	for {
		count, err := device.Read(packet[4:])
		fatal(err)
		if count < 20 || packet[4]>>4 != 4 {
			continue
		}
		destination, _ := netip.AddrFromSlice(packet[4+16 : 4+20])
		if to := senders[destination]; to != nil {
			binary.BigEndian.PutUint32(packet, uint32(count))
			to.send(node, packet[:4+count])
		}
	}
}

func (to *sender) send(node host.Host, frame []byte) {
	to.mutex.Lock()
	defer to.mutex.Unlock()
	to.used.Store(time.Now().UnixNano())
	for range attempts {
		if to.stream == nil {
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			err := node.Connect(ctx, to.peer)
			if err == nil {
				to.stream, err = node.NewStream(ctx, to.peer.ID, protocol)
			}
			cancel()
			if err != nil {
				fmt.Println("no stream:", strings.ReplaceAll(err.Error(), "\n", " "))
				time.Sleep(100 * time.Millisecond)
				continue
			}
			fmt.Println("opened")
		}
		if _, err := to.stream.Write(frame); err == nil {
			return
		}
		_ = to.stream.Reset()
		to.stream = nil
	}
}

func (to *sender) closeIdle() {
	for range time.Tick(lookEvery) {
		to.mutex.Lock()
		if to.stream != nil && time.Since(time.Unix(0, to.used.Load())) > idle {
			_ = to.stream.Close()
			to.stream = nil
			fmt.Println("closed")
		}
		to.mutex.Unlock()
	}
}

func receive(stream network.Stream, device *os.File) {
	defer stream.Close()
	head, packet := make([]byte, 4), make([]byte, mtu)
	for {
		if _, err := io.ReadFull(stream, head); err != nil {
			return
		}
		length := binary.BigEndian.Uint32(head)
		if length == 0 || length > mtu {
			fmt.Println("bad length:", length)
			return
		}
		if _, err := io.ReadFull(stream, packet[:length]); err != nil {
			return
		}
		_, _ = device.Write(packet[:length])
	}
}

func open(name string) *os.File {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	fatal(err)
	request, err := unix.NewIfreq(name)
	fatal(err)
	request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	fatal(unix.IoctlIfreq(fd, unix.TUNSETIFF, request))
	fatal(unix.SetNonblock(fd, true))
	return os.NewFile(uintptr(fd), "tun")
}

func fatal(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
