// Command generate asks a hidream-grpc server for one image and writes it to a file, while it
// prints how the drawing goes.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"

	"github.com/hidream-grpc/hidream-grpc/clients/go/hidream"
	hidreamv1 "github.com/hidream-grpc/hidream-grpc/clients/go/hidream/v1"
	"github.com/hidream-grpc/hidream-grpc/clients/go/internal/flags"
	"github.com/hidream-grpc/hidream-grpc/clients/go/internal/report"
)

func main() {
	server := flags.ServerOf(flag.CommandLine)
	out := flag.String("out", "picture.png", "file to write")
	request := &hidreamv1.GenerateRequest{Spec: flags.Spec(flag.CommandLine)}
	flags.Model(flag.CommandLine, &request.Model)
	flag.StringVar(&request.RequestId, "request-id", "", "a name for the request: the same one goes on with its job")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := draw(ctx, server, request, *out); err != nil {
		report.Error("generate", err)
		os.Exit(1)
	}
}

func draw(ctx context.Context, server *flags.Server, request *hidreamv1.GenerateRequest, out string) error {
	connection, err := server.Connect()
	if err != nil {
		return err
	}
	defer connection.Close()
	images, err := hidream.NewClient(connection).Generate(ctx, request, report.Reconnecting(), report.Event)
	if err != nil {
		return err
	}
	if err := os.WriteFile(out, images[0].Data, 0o644); err != nil {
		return err
	}
	fmt.Println(out)
	return nil
}
