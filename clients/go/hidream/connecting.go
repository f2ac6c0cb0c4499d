package hidream

import (
	"context"
	"net/http"
	"net/url"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
)

// DefaultKeepalive is how long a server may be silent before DialOptions has it asked whether it lives, and
// how long it may then take to answer. gRPC for Go allows no shorter time before it asks.
const DefaultKeepalive = 10 * time.Second

// DialOptions are the options of a connection that notices within twice DefaultKeepalive that its server has
// fallen silent, and connects again within seconds. They say nothing of how it is encrypted. The error of a
// connection that fails at a proxy of the environment names it.
func DialOptions() []grpc.DialOption {
	return []grpc.DialOption{
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: DefaultKeepalive, Timeout: DefaultKeepalive}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{
				BaseDelay: 200 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second,
			},
			// A server that takes connections and says nothing.
			MinConnectTimeout: 2 * DefaultKeepalive,
		}),
		grpc.WithChainUnaryInterceptor(nameProxy),
		grpc.WithChainStreamInterceptor(nameProxyOfStream),
	}
}

func nameProxy(
	ctx context.Context, method string, request, reply any,
	connection *grpc.ClientConn, invoke grpc.UnaryInvoker, options ...grpc.CallOption,
) error {
	err := invoke(ctx, method, request, reply, connection, options...)
	return throughProxy(connection.Target(), err)
}

func nameProxyOfStream(
	ctx context.Context, description *grpc.StreamDesc,
	connection *grpc.ClientConn, method string, streamer grpc.Streamer, options ...grpc.CallOption,
) (grpc.ClientStream, error) {
	stream, err := streamer(ctx, description, connection, method, options...)
	if err != nil {
		return nil, throughProxy(connection.Target(), err)
	}
	return &proxiedStream{ClientStream: stream, target: connection.Target()}, nil
}

type proxiedStream struct {
	grpc.ClientStream
	target string
}

func (s *proxiedStream) RecvMsg(message any) error {
	return throughProxy(s.target, s.ClientStream.RecvMsg(message))
}

// throughProxy adds the proxy to the error of a connection that fails there. An error of the server has details.
func throughProxy(target string, err error) error {
	converted, isStatus := status.FromError(err)
	if err == nil || !isStatus || converted.Code() != codes.Unavailable || len(converted.Details()) > 0 {
		return err
	}
	if strings.HasPrefix(target, "unix") {
		return err
	}
	host := target[strings.LastIndex(target, "/")+1:]
	// As gRPC asks, which takes no proxy to this machine itself.
	proxy, proxyErr := http.ProxyFromEnvironment(&http.Request{URL: &url.URL{Scheme: "https", Host: host}})
	if proxy == nil || proxyErr != nil {
		return err
	}
	return status.Errorf(codes.Unavailable, "%s (through the proxy %s)", converted.Message(), proxy.Host)
}
