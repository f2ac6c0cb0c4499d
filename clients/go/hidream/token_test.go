package hidream

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"math/big"
	"net"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	hidreamv1 "github.com/hidream-grpc/hidream-grpc/clients/go/hidream/v1"
)

const knownToken = "a-token-that-is-known"

// guarded describes itself to those who bring the token.
type guarded struct {
	hidreamv1.UnimplementedImageGenServer
}

func (guarded) GetServerInfo(
	ctx context.Context, _ *hidreamv1.GetServerInfoRequest,
) (*hidreamv1.ServerInfo, error) {
	given := metadata.ValueFromIncomingContext(ctx, "authorization")
	if len(given) != 1 || given[0] != "Bearer "+knownToken {
		return nil, status.Error(codes.Unauthenticated, "a token is needed")
	}
	return &hidreamv1.ServerInfo{Layout: "tp=1"}, nil
}

// serve has a guarded server listen on loopback until the test ends.
func serve(t *testing.T, options ...grpc.ServerOption) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(options...)
	hidreamv1.RegisterImageGenServer(server, guarded{})
	ended := make(chan error)
	go func() { ended <- server.Serve(listener) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return listener.Addr().String()
}

func ask(t *testing.T, address string, options ...grpc.DialOption) (*hidreamv1.ServerInfo, error) {
	t.Helper()
	connection, err := grpc.NewClient(address, options...)
	if err != nil {
		t.Fatal(err)
	}
	defer connection.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	return hidreamv1.NewImageGenClient(connection).GetServerInfo(ctx, &hidreamv1.GetServerInfoRequest{})
}

// selfSigned is a certificate of 127.0.0.1 that vouches for itself.
func selfSigned(t *testing.T) (tls.Certificate, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(time.Hour),
		IPAddresses:           []net.IP{net.IPv4(127, 0, 0, 1)},
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(certificate)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, roots
}

func TestATokenOpensTheDoorWithAndWithoutTLS(t *testing.T) {
	certificate, roots := selfSigned(t)
	encrypted := serve(t, grpc.Creds(credentials.NewServerTLSFromCert(&certificate)))
	for name, connection := range map[string]struct {
		address   string
		transport credentials.TransportCredentials
	}{
		"plaintext": {serve(t), insecure.NewCredentials()},
		"TLS":       {encrypted, credentials.NewTLS(&tls.Config{RootCAs: roots})},
	} {
		t.Run(name, func(t *testing.T) {
			transport := grpc.WithTransportCredentials(connection.transport)
			info, err := ask(t, connection.address, transport, grpc.WithPerRPCCredentials(BearerToken(knownToken)))
			if err != nil {
				t.Fatal(err)
			}
			if info.GetLayout() != "tp=1" {
				t.Errorf("the answer is %v", info)
			}
			for _, options := range [][]grpc.DialOption{
				{transport},
				{transport, grpc.WithPerRPCCredentials(BearerToken("another-token"))},
			} {
				if _, err := ask(t, connection.address, options...); status.Code(err) != codes.Unauthenticated {
					t.Errorf("got %v, want Unauthenticated", err)
				}
			}
		})
	}
}

func TestATokenIsNotPrinted(t *testing.T) {
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q"} {
		if shown := fmt.Sprintf(verb, BearerToken(knownToken)); strings.Contains(shown, knownToken) {
			t.Errorf("%s shows %s", verb, shown)
		}
	}
}
